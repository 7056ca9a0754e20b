"""Programs that only a build needs: for manual pages, completions, documents and `make install`.

`debian/` builds the Debian package with them. `environment/` has the files of the program's own Python environment
that pip does not make.
"""
