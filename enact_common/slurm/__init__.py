"""Submit trainings and evaluations as Slurm jobs that resume after a time-out."""
