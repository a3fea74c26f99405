def write_page(preset, folder, about):
    return folder
