-- The carts, and all that PostgreSQL keeps of them. Loading it again changes nothing.

-- COLLATE "C" compares and orders by code point, whatever the database's locale is.
CREATE TABLE IF NOT EXISTS cart_items (
    user_id    text COLLATE "C" NOT NULL,
    product_id text COLLATE "C" NOT NULL,
    quantity   integer NOT NULL,
    CONSTRAINT cart_items_pkey PRIMARY KEY (user_id, product_id),
    CONSTRAINT cart_items_user_id_length CHECK (char_length(user_id) BETWEEN 1 AND 255),
    CONSTRAINT cart_items_product_id_length CHECK (char_length(product_id) BETWEEN 1 AND 255),
    CONSTRAINT cart_items_quantity_positive CHECK (quantity > 0)
);
