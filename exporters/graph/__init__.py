"""What an ONNX graph is: read, written, analysed, weighed; what changes one is elsewhere, by means of `builder`.

It imports models. Words that the whole of exporters uses:

    movement      operators that move elements and compute nothing: Transpose, Reshape, Slice, Gather, Concat, ...
    index map     what movement does, as a function of output indices: which input element stands at each
    region        connected movement between operators that compute
    token         one row of a value [B, *tokens, C]; the token-level view says what computes, permutes or reduces rows
    layout        the order in which the rows of a value stand
    index sets    a part of a value: the rows that are meant on each axis
    lowering      a way to write a movement: the cheapest of several is chosen
    analysis      what is known of each value: shape at the smallest and at the largest batch, constant or not
    batch         the axis of samples, whose size stands for any; `shapes.BATCH` is the size that it is analysed at
    rows          a value read as tokens: all axes but the last are places, the last is channels
    cost          bytes that movement writes, multiplications, bytes of constants
    kernels       what TensorRT is predicted to make of a graph: launches, bytes moved between them
    artifact      one ONNX file of a bundle, with how it was made
    bundle        the folder of a model: artifacts, engines, golden outputs, reports, manifest
    golden        inputs and the eager model's outputs, recorded at export
    remark        why a pass did not act where it could have
    engine        what a compiler of NVIDIA's makes of an ONNX file; its file is a plan
    sidecar       the JSON file beside a plan: what it was made of, and its kernels
    target        the product, the GPUs and the shapes that an engine is for
"""
