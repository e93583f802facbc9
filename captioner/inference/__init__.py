"""A photo and a checkpoint -> a Caption, alone or by the million; renderings and exports."""
