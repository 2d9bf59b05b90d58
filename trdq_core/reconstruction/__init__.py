"""Learning the rounding of weights on the outputs of layers, blocks and the temporal block (AdaRound, BRECQ, TFMQ-DM)."""
