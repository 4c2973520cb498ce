"""From an eager model to what is deployed: a module here is a journey (export, optimize, cast, quantize, build, verify,
inspect), or a part that only journeys share; a folder is a subject.

Folders know no journey. Which folder may import which is the table in tests/test_repository.py; from the bottom:
graph, bundle, data, runtime, verification, target, lint, precision, passes, tensorrt, the journeys, bench and serving.
One more journey is a module here, and a command in deploycli/commands that calls it once.
"""
