"""The floor: Flask with a constant answer and no database."""

from flask import Flask

app = Flask(__name__)


@app.route("/cart/users/<user_id>", methods=["GET", "POST", "DELETE"])
def constant(user_id: str) -> list[dict[str, object]]:
    return [{"product_id": "p1", "quantity": 1}]
