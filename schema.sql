-- The carts, and all that PostgreSQL keeps of them. Loading it again leaves the data as they are; over the schema of
-- an older version it is the upgrade. It is one transaction and a check, and waits for each lock one second at most,
-- so that requests behind it do not wait for long.

BEGIN ISOLATION LEVEL READ COMMITTED;
SET LOCAL lock_timeout = '1s';
SET LOCAL statement_timeout = 0;
DO $$ BEGIN PERFORM pg_advisory_xact_lock(0); END $$; -- two of these at once would create the same things

-- Another encoding lacks characters that ids may have.
DO $$ BEGIN
    IF current_setting('server_encoding') <> 'UTF8' THEN
        RAISE 'the database is in %, and must be in UTF8', current_setting('server_encoding');
    END IF;
END $$;

-- COLLATE "C" compares and orders by code point, whatever the database's locale is.
CREATE TABLE IF NOT EXISTS cart_items (
    user_id    text COLLATE "C" NOT NULL,
    product_id text COLLATE "C" NOT NULL,
    quantity   integer NOT NULL,
    -- Without an index, so that a change of a line needs no new index entry (a HOT update).
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT cart_items_pkey PRIMARY KEY (user_id, product_id),
    CONSTRAINT cart_items_user_id_length CHECK (char_length(user_id) BETWEEN 1 AND 255),
    CONSTRAINT cart_items_product_id_length CHECK (char_length(product_id) BETWEEN 1 AND 255),
    CONSTRAINT cart_items_quantity_positive CHECK (quantity > 0)
);

-- A new version changes a table here, so that a new database and an upgraded one are alike, and only in ways that the
-- version before can live with. A function with other parameters comes beside the old one, which a later version drops.
-- The schema that was released goes to testdata/, from where the tests upgrade it.

-- 4.0.0: when a line was made, for the cart's order. The lines that are there get one time, without a rewrite of the
-- table. ADD COLUMN IF NOT EXISTS would lock the table even if there is nothing to do. A change with a key locks a row
-- of idempotency_keys, writes to cart_items, then to idempotency_keys: locks in another order could deadlock with it.
DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'cart_items'::regclass AND attname = 'added_at') THEN
        ALTER TABLE cart_items ADD COLUMN added_at timestamptz NOT NULL DEFAULT now();
        ALTER TABLE cart_items ALTER COLUMN added_at SET DEFAULT clock_timestamp(); -- the lines of a list differ
    END IF;
END $$;

-- The keys of changes that must count once however often they are sent, with what was asked and answered.
CREATE TABLE IF NOT EXISTS idempotency_keys (
    user_id    text COLLATE "C" NOT NULL,
    key        text COLLATE "C" NOT NULL,
    request    bytea NOT NULL, -- the SHA-256 of the changes in JSON
    quantities integer[] NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT idempotency_keys_pkey PRIMARY KEY (user_id, key),
    CONSTRAINT idempotency_keys_user_id_length CHECK (char_length(user_id) BETWEEN 1 AND 255),
    CONSTRAINT idempotency_keys_key_length CHECK (char_length(key) BETWEEN 1 AND 255),
    CONSTRAINT idempotency_keys_request_length CHECK (octet_length(request) = 32)
);
CREATE INDEX IF NOT EXISTS idempotency_keys_created_at ON idempotency_keys (created_at);

-- Each function that writes to a cart first takes the lock of its user. So no two of them wait for each other, each
-- sees all or nothing of another, and what a function has read stays true until it ends.

-- Adds amounts to lines of a cart, or sets the lines to them, in the order of the list; returns the new totals in that
-- order. If one cannot be changed none is: the error's DETAIL is its place. cart.py answers these errors by SQLSTATE:
--   numeric_value_out_of_range  22003  the line's total would be above the largest integer
--   program_limit_exceeded      54000  the line would be a new one in a cart of `max_lines` lines
--   unique_violation            23505  the key was used with another request
-- With a key (not NULL) the list counts once in 24 hours; later calls return what the first one did.
CREATE OR REPLACE FUNCTION change_cart(
    of_user text, is_set boolean, product_ids text[], amounts integer[], max_lines integer, with_key text,
    for_request bytea
) RETURNS integer[] LANGUAGE plpgsql AS $$
DECLARE
    lines integer; -- how many the cart has; NULL if they are not counted yet
    before integer; -- the line's quantity; NULL if there is no line
    total bigint; -- its quantity after the change
    totals integer[] = '{}';
    known idempotency_keys;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended(of_user, 0));
    IF with_key IS NOT NULL THEN
        -- The row's lock is a write, and so waits for a synchronous standby: what was answered survives a failover.
        SELECT * INTO known FROM idempotency_keys
        WHERE user_id = of_user AND key = with_key AND created_at > now() - interval '24 hours' FOR UPDATE;
        IF FOUND THEN
            IF known.request <> for_request THEN
                RAISE unique_violation;
            END IF;
            RETURN known.quantities;
        END IF;
    END IF;
    FOR place IN 1 .. cardinality(product_ids) LOOP
        SELECT quantity INTO before FROM cart_items WHERE user_id = of_user AND product_id = product_ids[place];
        total = greatest(CASE WHEN is_set THEN 0 ELSE coalesce(before, 0) END::bigint + amounts[place], 0);
        IF total > 2147483647 THEN
            RAISE numeric_value_out_of_range USING DETAIL = place;
        ELSIF total = 0 THEN
            DELETE FROM cart_items WHERE user_id = of_user AND product_id = product_ids[place];
            lines = NULL; -- count again: the cart may have a line less now
        ELSE
            IF before IS NULL THEN
                IF lines IS NULL THEN
                    SELECT count(*) INTO lines FROM cart_items WHERE user_id = of_user;
                END IF;
                lines = lines + 1;
                IF lines > max_lines THEN
                    RAISE program_limit_exceeded USING DETAIL = place;
                END IF;
            END IF;
            INSERT INTO cart_items (user_id, product_id, quantity) VALUES (of_user, product_ids[place], total)
            ON CONFLICT ON CONSTRAINT cart_items_pkey
            DO UPDATE SET quantity = EXCLUDED.quantity, updated_at = EXCLUDED.updated_at;
        END IF;
        totals = totals || total::integer;
    END LOOP;
    IF with_key IS NOT NULL THEN
        INSERT INTO idempotency_keys (user_id, key, request, quantities)
        VALUES (of_user, with_key, for_request, totals)
        ON CONFLICT ON CONSTRAINT idempotency_keys_pkey -- a key that is older than 24 hours
        DO UPDATE SET request = EXCLUDED.request, quantities = EXCLUDED.quantities, created_at = EXCLUDED.created_at;
    END IF;
    RETURN totals;
END
$$;

-- As 3.0.0 calls it. The next version drops it.
CREATE OR REPLACE FUNCTION change_cart(
    of_user text, product_ids text[], changes integer[], max_lines integer, with_key text, for_request bytea
) RETURNS integer[] LANGUAGE sql AS 'SELECT change_cart($1, false, $2, $3, $4, $5, $6)';

-- Removes a product's line, or all lines of the cart if no product is named (NULL); returns whether there were any.
CREATE OR REPLACE FUNCTION empty_cart(of_user text, of_product text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended(of_user, 0));
    DELETE FROM cart_items WHERE user_id = of_user AND (of_product IS NULL OR product_id = of_product);
    RETURN FOUND;
END
$$;

-- Removes the carts in which no line was added or changed for a number of days (none if `days` is NULL), one in a
-- transaction, then the keys that count no longer, ten thousand in a transaction; returns how many of both. It leaves a
-- cart that is in use for the next call. A crash may bring back what it removed last (synchronous_commit).
CREATE OR REPLACE PROCEDURE expire(days integer, INOUT carts bigint DEFAULT 0, INOUT keys bigint DEFAULT 0)
LANGUAGE plpgsql AS $$
DECLARE
    of_user text;
    free_lines bigint;
    removed bigint;
BEGIN
    FOR of_user IN
        SELECT user_id FROM cart_items GROUP BY user_id HAVING max(updated_at) < now() - make_interval(days => days)
    LOOP
        SET LOCAL synchronous_commit = off;
        -- It is removed only if this call gets its user's lock and all of its lines without waiting. The lock is taken
        -- with the lines', so that Citus takes it on the machine that has them.
        SELECT count(*) INTO free_lines FROM (
            SELECT pg_try_advisory_xact_lock(hashtextextended(of_user, 0)) AS is_free
            FROM cart_items WHERE user_id = of_user FOR UPDATE SKIP LOCKED
        ) AS line WHERE is_free;
        DELETE FROM cart_items WHERE user_id = of_user
        AND free_lines = (SELECT count(*) FROM cart_items AS line WHERE line.user_id = of_user)
        AND NOT EXISTS (
            SELECT FROM cart_items AS line
            WHERE line.user_id = of_user AND line.updated_at >= now() - make_interval(days => days)
        );
        IF FOUND THEN
            carts = carts + 1;
        END IF;
        COMMIT;
    END LOOP;
    LOOP
        SET LOCAL synchronous_commit = off;
        DELETE FROM idempotency_keys AS old USING (
            SELECT user_id, key FROM idempotency_keys WHERE created_at <= now() - interval '24 hours'
            ORDER BY created_at LIMIT 10000
        ) AS oldest
        WHERE old.user_id = oldest.user_id AND old.key = oldest.key AND old.created_at <= now() - interval '24 hours';
        GET DIAGNOSTICS removed = ROW_COUNT;
        keys = keys + removed;
        COMMIT;
        EXIT WHEN removed = 0;
    END LOOP;
END
$$;

-- Changes nothing, but fails if the service cannot change the carts: a table, its key, a function or a right is
-- missing, or the server only reads. No cart has the empty user.
CREATE OR REPLACE FUNCTION check_carts() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM change_cart('', false, '{}', '{}', 0, NULL, NULL), empty_cart('', NULL);
    INSERT INTO cart_items SELECT * FROM cart_items WHERE user_id = ''
    ON CONFLICT ON CONSTRAINT cart_items_pkey DO NOTHING;
    UPDATE cart_items SET quantity = quantity, updated_at = updated_at WHERE user_id = '';
    INSERT INTO idempotency_keys SELECT * FROM idempotency_keys WHERE user_id = ''
    ON CONFLICT ON CONSTRAINT idempotency_keys_pkey DO NOTHING;
    UPDATE idempotency_keys SET request = request, quantities = quantities WHERE user_id = '';
    DELETE FROM idempotency_keys WHERE user_id = '';
END
$$;

-- If Citus is installed, the tables are spread over its machines by user, a user's rows side by side, and a
-- function about one user runs on the machine that has the rows. So its lock is one for all machines.
DO $$
DECLARE
    about_one_user regprocedure;
BEGIN
    IF EXISTS (SELECT FROM pg_extension WHERE extname = 'citus') THEN
        IF NOT EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = 'cart_items'::regclass) THEN
            PERFORM create_distributed_table('cart_items', 'user_id');
            PERFORM create_distributed_table('idempotency_keys', 'user_id', colocate_with => 'cart_items');
        END IF;
        FOR about_one_user IN
            SELECT oid FROM pg_proc WHERE proname IN ('change_cart', 'empty_cart')
        LOOP
            PERFORM create_distributed_function(about_one_user, 'of_user', colocate_with => 'cart_items');
        END LOOP;
    END IF;
END
$$;

COMMIT;

-- What was loaded works. This is checked without the locks of the loading, for which requests would wait.
BEGIN;
SET LOCAL lock_timeout = '1s';
DO $$ BEGIN PERFORM check_carts(); END $$;
COMMIT;
