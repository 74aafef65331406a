"""Images of databases, for devices that begin with all there is (R35).

cutting    a collection, cut into segments
building   one image, from one snapshot; whether one is due
files      where its files are
rows       the record of the database that says which images count
keeping    when one is made, how long it is kept, what of it counts
manifests  what a manifest says
serving    a segment, or a part of one
answers    the same over HTTP
snapshot   an image in one file
"""
