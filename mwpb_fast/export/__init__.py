"""A run's model in forms that other programs read, each checked against the model before it is said to be there.

Nothing heavy is imported here.
"""

# by the name of a form, what its files end in
FORMATS = {"safetensors": ".safetensors", "robustbench": ".pt", "torch-export": ".pt2", "onnx": ".onnx"}
CARD = "README.md"
MARK = "written by `mwpb-fast export`"  # in every card, so that nobody else's README is replaced
