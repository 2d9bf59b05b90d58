"""Many recipes at many bit-widths on many pictures: sampled in batches, measured, and gone on with after a stop."""
