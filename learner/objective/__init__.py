"""The formulas: whitening, reward, advantage and off-policy correction. Tensors in, tensors out.

Floors, top to bottom: parity; advantage; reward, whitening, off_policy. Knows Gram statistics and nothing else.
"""
