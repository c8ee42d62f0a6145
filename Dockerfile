FROM nginx:1.31.3-alpine AS proxy
COPY nginx.conf /etc/nginx/nginx.conf
USER 65534:65534

FROM python:3.14.7-slim-trixie
WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore -r requirements.txt
COPY *.py openapi.yaml schema.sql ./
ENV FLASK_APP=cart
USER 10001:10001
EXPOSE 8080
CMD ["gunicorn", "cart:app"]
