"""What a set of members does on images it never saw: logits, scores, calibration, mistakes, ensembles, pages."""
