"""The console: a page for administrators of a server, made of files in this package.

    serving   answers with the files, and says what the page may do
    static    the page: HTML, one style sheet, and JavaScript modules as the browser runs them

The page asks administration (``admin``) like any other program, with a token that it holds in its
memory alone; the files say nothing about databases or people.
"""
