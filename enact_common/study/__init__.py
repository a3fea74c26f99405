"""A controlled study of what ENACT costs in accuracy: trainings that differ in the encoder's attention alone.

    python -m enact_common.study --preset cpu --output_dir study

`arms` lists what is compared, `presets` how long and on what, `images` makes the data, `training` trains one arm,
`costs` measures time and memory, `page` writes what came out.
"""
