"""Every command that changes an image, under fire: commands x shapes of image = trials, each looked at by a judge.

commands    the command lines, with what the image needs first
shapes      the images
trial       one command on one image: the old state, the new one, and a judge who knows both
judge       what a folder is worth: the old state, the new one, or something that must not be
calls       the functions of `os` that count
order       in which order things must reach the disk, as rules about what was recorded

Four kinds of fire (`fires`), each with one function that tries a command on a shape and gives an Outcome:

replay      power cuts: `recorder` writes down what a command does, `disk` and `choosing` say what may be left of it
trying      failing calls, of which `faults` is the list
interrupts  calls that a signal interrupts, by strace
kills       signals to real processes

`python -m tests.crash` tries all of them, the tests here a sample.
"""
