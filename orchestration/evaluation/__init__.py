"""What is measured on held-out documents, during a run and of a checkpoint, with its uncertainty.

During a run: validation; evaluation, which knows roles. Of a checkpoint: checkpoint_evaluation; problem_solving;
measures; evaluate_config, feature_process, intervals,
pass_at_k, problems. Knows nothing of the loops.
"""
