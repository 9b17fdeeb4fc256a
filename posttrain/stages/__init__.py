"""How each stage of config/stages.py is trained: one module a stage, named as it is."""
