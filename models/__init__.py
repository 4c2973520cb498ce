"""Reference PyTorch models, and what they are made of elsewhere: registry, checkpoints, preprocessing.

It imports nothing else of ours, and importing it imports nothing heavy. One more variant is one line in `variants`; one
more family is a file with its model and what reads its authors' checkpoints, and its name in `build.FAMILIES`.
"""
