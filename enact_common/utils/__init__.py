"""Tools that every part may use: errors, files, devices, processes, signals."""
