"""The contract by which weights travel from the learner to the rollout workers, and the transports that carry them.

The receiver owns it: the learner imports this room, which knows neither the learner nor an engine.
"""
