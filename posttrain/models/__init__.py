"""Models: found, loaded, adapted, sampled from, saved and compared with what was trained."""
