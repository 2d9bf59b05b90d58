"""How the pocket models were made: one command a stage, each resumable. See README.md beside this file."""
