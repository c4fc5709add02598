"""llmpress: a compression recipe is a typed program over models, planned from shapes and run from a content-addressed store.

Read from the bottom up: errors, spec, headers, artifact, target, stage; worker; recipe; graph, identity, store; plan;
executor; report and tracking, which only listen; cli.
"""

__version__ = "0.1.0"
