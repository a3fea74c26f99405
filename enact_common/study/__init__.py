"""A controlled study of ENACT's accuracy: trainings that differ only in the encoder attention.

    python -m enact_common.study --preset cpu --output_dir study

`arms` defines the arms and their changes of the model, `presets` the arms' list and the study's sizes, `images` draws,
`photographs` reads or pastes photographs, `features` computes a frozen backbone's features of them, `sources` keeps
the data in files, `training` trains one arm, `costs` measures time and memory, `page` writes the results.
"""
