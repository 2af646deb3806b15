// Shows the API's own description. Nothing is fetched from, or sent to, any other host.
window.addEventListener("load", () =>
  SwaggerUIBundle({ url: "/openapi.json", dom_id: "#docs", deepLinking: true, validatorUrl: null, persistAuthorization: false }));
