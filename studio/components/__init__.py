"""Pieces of pages: HTML readouts and the sidebar's controls."""
