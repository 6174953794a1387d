"""`safediffusion tiny`."""
import typer
app = typer.Typer()
@app.command()
def build() -> None:
    """Soon."""
