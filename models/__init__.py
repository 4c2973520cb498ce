"""Reference PyTorch models, and what they are made of elsewhere: registry, checkpoints, preprocessing.

It imports nothing else of ours, and importing it imports nothing heavy. One more variant is one function in `variants`;
one more family is a file with its model, a file that reads its authors' checkpoints, and its entry in `families`.
"""
