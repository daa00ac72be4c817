"""The formulas: whitening, reward, advantage and off-policy correction. Tensors in, tensors out.

Floors, top to bottom: parity; advantage, off_policy; reward, whitening, importance. Knows Gram statistics, no more.
"""
