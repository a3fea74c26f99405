"""Trainings and evaluations as jobs of a Slurm cluster, which go on after a time-out."""
