"""`python -m keras_blur COMMAND [flags]` is `keras-blur COMMAND [flags]`."""

from keras_blur.cli import main

if __name__ == "__main__":
    main()
