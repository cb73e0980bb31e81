"""Methods decide what to cut; one file each, found by its name."""
