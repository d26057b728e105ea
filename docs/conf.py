"""Sphinx: the README and the pages, the API reference from the docstrings, and the notebooks.

python notebooks/run.py --save docs/notebooks && python -m sphinx -W docs build/docs
"""

import os

import flash_jax

os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported
project = "flash_jax"
release = flash_jax.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

html_theme = "sphinx_book_theme"
html_title = f"flash_jax {release}"
html_theme_options = {"navbar_persistent": []}  # its search is in the sidebar, too

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # links to headings, as GitHub has them
nb_execution_mode = "off"  # notebooks/run.py has run them
nb_merge_streams = True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the text names shapes and dtypes
napoleon_use_ivar = True


def setup(app):
    """Shows the default of probability_dtype as it is written.

    ``autodoc_preserve_defaults`` reads defaults in the function's own source, and the signature of
    ``flash_attention_int8`` is written in another function.
    """

    def written(app, what, name, obj, options, signature, returns):
        return signature and signature.replace("<class 'numpy.uint8'>", "np.uint8"), returns

    app.connect("autodoc-process-signature", written)
