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

-- The keys of adds that are to count once however often they are sent, with what was asked and answered.
CREATE TABLE IF NOT EXISTS idempotency_keys (
    user_id    text COLLATE "C" NOT NULL,
    key        text COLLATE "C" NOT NULL,
    product_id text COLLATE "C" NOT NULL,
    change     integer NOT NULL,
    quantity   integer NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT idempotency_keys_pkey PRIMARY KEY (user_id, key),
    CONSTRAINT idempotency_keys_user_id_length CHECK (char_length(user_id) BETWEEN 1 AND 255),
    CONSTRAINT idempotency_keys_key_length CHECK (char_length(key) BETWEEN 1 AND 255),
    CONSTRAINT idempotency_keys_product_id_length CHECK (char_length(product_id) BETWEEN 1 AND 255),
    CONSTRAINT idempotency_keys_change_not_zero CHECK (change <> 0),
    CONSTRAINT idempotency_keys_quantity_not_negative CHECK (quantity >= 0)
);
CREATE INDEX IF NOT EXISTS idempotency_keys_created_at ON idempotency_keys (created_at);

-- Where Citus is installed, both tables are spread over its machines by user, a user's rows side by side.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_extension WHERE extname = 'citus') THEN
        IF NOT EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = 'cart_items'::regclass) THEN
            PERFORM create_distributed_table('cart_items', 'user_id');
            PERFORM create_distributed_table('idempotency_keys', 'user_id', colocate_with => 'cart_items');
        END IF;
    END IF;
END
$$;
