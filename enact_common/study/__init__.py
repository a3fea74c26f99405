"""A controlled study of ENACT's accuracy: trainings that differ only in the encoder attention.

    python -m enact_common.study --preset cpu --output_dir study

`arms` defines the arms and their changes of the model, `presets` the arms' list and the study's sizes, `images` makes
the data, `training` trains one arm, `costs` measures time and memory, `page` writes the results.
"""
