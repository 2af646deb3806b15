"""How it is run: the `muniment` command, the worker, migrations, the bench."""
