"""Blocks denoised one after the other: remasking, editing, sub-blocks, S2D2."""
