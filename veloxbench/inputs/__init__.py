"""What is measured on: models, texts and the sources that they come from, each verified before it is used. Nothing here
knows what a cache or a measurement is.
"""
