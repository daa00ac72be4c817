"""The frozen network, its features, and their inner products.

Floors, top to bottom: server; feature_model, pooled_whitening; pooling, gram, retokenization. Learner knows gram alone.
"""
