"""The lesson: encoder, attention, decoder, search. Read encoder.py, decoder.py, search.py."""
