"""Other people's checkpoints become ConvT5: Mesh-TensorFlow's (the paper's) and T5's."""
