//! Every metric of the worker and of the frontend, declared once.
