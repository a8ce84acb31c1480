"""Evaluation of predictions: scores, comparisons of models, post-processing, reports and figures."""
