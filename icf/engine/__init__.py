"""What runs a model: training, evaluation, prediction, checkpoints, metrics, reports."""
