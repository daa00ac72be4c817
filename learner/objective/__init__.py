"""The formulas: whitening, reward, advantage and off-policy correction. Tensors in, tensors out.

Imports of this project: Gram statistics alone.
"""
