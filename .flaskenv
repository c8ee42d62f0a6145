# What `flask` finds by itself during development, if python-dotenv is installed. The environment comes first.
FLASK_APP=cart
DATABASE_URL=private
