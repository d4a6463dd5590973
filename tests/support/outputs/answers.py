"""Answers of a model, as graders get them."""

GOOD = """ Una interfaz describe la forma de un objeto: qué propiedades tiene y de qué tipo es cada una.

```ts
interface Libro {
  readonly titulo: string;
  paginas?: number;
}
```

**Cuándo usarlo:** cuando varias funciones comparten la misma estructura.

**Error habitual:** confundir `interface` con una clase; no existe en ejecución."""
