"""The peer: the same three statements in FastAPI with asyncpg, without the service's checks."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

ADD = """
    INSERT INTO cart_items (user_id, product_id, quantity) VALUES ($1, $2, $3)
    ON CONFLICT (user_id, product_id) DO UPDATE SET quantity = cart_items.quantity + EXCLUDED.quantity
    RETURNING quantity
"""
READ = "SELECT product_id, quantity FROM cart_items WHERE user_id = $1 ORDER BY product_id"
EMPTY = "DELETE FROM cart_items WHERE user_id = $1"
NOT_FOUND = HTTPException(404, "No cart items found for this user")


class Item(BaseModel):
    product_id: str
    quantity: int


@asynccontextmanager
async def connected(app: FastAPI) -> AsyncIterator[None]:
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=8, max_size=8) as app.state.pool:
        yield


app = FastAPI(lifespan=connected)


@app.post("/cart/users/{user_id}")
async def add(user_id: str, item: Item) -> dict[str, Any]:
    total = await app.state.pool.fetchval(ADD, user_id, item.product_id, item.quantity)
    return {"user_id": user_id, "product_id": item.product_id, "quantity": total}


@app.get("/cart/users/{user_id}")
async def read(user_id: str) -> list[dict[str, Any]]:
    lines = await app.state.pool.fetch(READ, user_id)
    if not lines:
        raise NOT_FOUND
    return [dict(line) for line in lines]


@app.delete("/cart/users/{user_id}")
async def empty(user_id: str) -> dict[str, str]:
    if await app.state.pool.execute(EMPTY, user_id) == "DELETE 0":
        raise NOT_FOUND
    return {"msg": "All cart items deleted"}
