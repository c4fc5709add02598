"""What runs in the interpreter of an isolated backend (pipeline/isolated.py): one module for each library, which imports it at the top.

Each has functions `(ctx, source, output, windows, **settings)` that quantize the model folder `source` on the token ids in the file
`windows` and save it to `output` as the library does. They return {"losses": of the first window by the library's own kernels, so that
llmpress can tell whether it reads the files as the library does; "notes": what the user should know}.
"""
