"""The plugins: one file per stage, independent of each other. `functional/` is pure tensor maths, `runtime/` what stages share."""
