"""What each layer's bits cost: every linear quantized alone, at several bit-widths."""
